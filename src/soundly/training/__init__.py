"""Networks trained together with their explanations.

`sst` trains networks that name the features that suffice for their prediction, `interpretable` networks whose maps
stay where they are. `masking`, `bounds`, `maps` and `attack` are what these losses are made of, `fit` is the loop,
`data` has the images, `report` and `stability` say what was reached.
"""
