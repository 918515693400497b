"""Explanations of predictions, as networks."""

from soundly.explanation.attribution import gradcam as gradcam
from soundly.explanation.attribution import integrated_gradients as integrated_gradients
