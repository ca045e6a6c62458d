"""The `recsys` command line."""

import os
import sys

if sys.argv[1:2] == ["serve"]:  # BLAS reads it once, when numpy is imported: workers share the cores by themselves
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
