"""The fixtures of `curvature_cases.py`."""

from curvature_cases import case, cases, dense_operator, outliers

__all__ = ["case", "cases", "dense_operator", "outliers"]
