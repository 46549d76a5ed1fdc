"""What the ranks of `rank_processes` have imported when they start."""

import bitsandbytes  # noqa: F401

import rank_loops  # noqa: F401
import rank_runs  # noqa: F401
import rank_shards  # noqa: F401
import tiny_runs  # noqa: F401
import tunesmith.train.follow
import tunesmith.train.run  # noqa: F401
