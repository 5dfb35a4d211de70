"""The good bundles that the cases here spoil."""

from tests.bundle.conftest import image_bundle, text_bundle

__all__ = ["image_bundle", "text_bundle"]
