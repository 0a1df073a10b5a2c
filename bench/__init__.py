"""What is measured, against whom, and the committed results. See ``bench/README.md``."""

import os

# torch's profiler, which counts allocated bytes, otherwise writes its progress to stderr; it
# reads this when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
