"""What tests of this room share."""

from tests.leftovers import eventually, nothing_left_over, open_descriptors

__all__ = ["eventually", "nothing_left_over", "open_descriptors"]
