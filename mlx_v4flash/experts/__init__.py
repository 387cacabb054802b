"""Where routed experts live."""

from .products import Experts, SharedExpert
from .resident import ResidentExperts

__all__ = ["Experts", "ResidentExperts", "SharedExpert"]
