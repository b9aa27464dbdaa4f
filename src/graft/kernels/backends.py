"""Importing this module registers every implementation of every operation, by family."""

import graft.kernels.attention.native
import graft.kernels.attention.reference
import graft.kernels.frozen.native
import graft.kernels.frozen.reference
import graft.kernels.frozen.triton
import graft.kernels.latent.native
import graft.kernels.latent.reference
import graft.kernels.latent.triton
import graft.kernels.low_rank.native
import graft.kernels.low_rank.reference
import graft.kernels.low_rank.triton
import graft.kernels.moves.native
import graft.kernels.moves.reference
import graft.kernels.moves.triton
import graft.kernels.pointwise.native
import graft.kernels.pointwise.reference
import graft.kernels.pointwise.triton
import graft.kernels.rounded.native
import graft.kernels.rounded.reference  # noqa: F401
