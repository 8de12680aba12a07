"""The embedded default: a small trained model, the world it knows, and tasks made of it. No network needed."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
