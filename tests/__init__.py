"""What must be set before anything is imported."""

import os
import tempfile

# transformers copies the code of an export to a cache before it imports it, and two processes may not share one.
_modules = tempfile.TemporaryDirectory()
os.environ["HF_MODULES_CACHE"] = _modules.name
