"""BAGEL: one architecture, any size (docs/specs/bagel.md). The embedded ``srum-tiny`` is this code with a small config.

``config`` what is read from a checkpoint folder; ``positions`` fixed tables; ``network`` the weights and their forward;
``sequence`` segments to a packed batch; ``cache`` keys and values of a context; ``images`` the resize rule and patches;
``autoencoder`` the FLUX autoencoder through diffusers; ``checkpoint`` the official file layout; ``model`` the adapter
that meets ``srum.models.base.UnifiedModel``.
"""

from srum.models.bagel.model import Bagel

__all__ = ["Bagel"]
