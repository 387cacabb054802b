"""Where routed experts live."""

from .resident import ExpertMatrix, ResidentExperts, SharedExpert

__all__ = ["ExpertMatrix", "ResidentExperts", "SharedExpert"]
