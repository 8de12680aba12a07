"""Measure: which attention heads do a task. The contents page is `__init__.pyi`; everything is loaded on first use."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
