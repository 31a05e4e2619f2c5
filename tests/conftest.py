"""One thread a test process: a loaded machine with spinning threads is several times slower."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
