"""Explanations of predictions: attributions as networks, what is certain about them, and reasons with proof."""

from soundly.explanation.attribution import cam as cam
from soundly.explanation.attribution import contributions as contributions
from soundly.explanation.attribution import gradcam as gradcam
from soundly.explanation.attribution import integrated_gradients as integrated_gradients
from soundly.explanation.attribution import smoothgrad as smoothgrad
from soundly.explanation.certified import certify_change as certify_change
from soundly.explanation.certified import certify_map as certify_map
from soundly.explanation.certified import certify_top_k as certify_top_k
