"""Training in a random subspace of the weights, and the search for the smallest that is large enough."""

from lightning_sketch.subspace.subspace_module import SubspaceModule as SubspaceModule
