"""A network as a graph of three kinds of operation: linear, product, elementwise (and composites made of them)."""

from soundly.graph.differentiate import differentiate as differentiate
from soundly.graph.network import Network as Network
from soundly.graph.node import Composite as Composite
from soundly.graph.node import Constant as Constant
from soundly.graph.node import Fill as Fill
from soundly.graph.node import Input as Input
from soundly.graph.node import Leaf as Leaf
from soundly.graph.node import Linear as Linear
from soundly.graph.node import Node as Node
from soundly.graph.node import Op as Op
from soundly.graph.node import Parameter as Parameter
from soundly.graph.node import Product as Product
from soundly.graph.node import topological as topological
from soundly.graph.simplify import simplify as simplify
