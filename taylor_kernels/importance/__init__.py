"""Importance: a meter on a model that scores its filters, minibatch by minibatch."""

from taylor_kernels.importance.meter import Importance

__all__ = ["Importance"]
