"""What the trainer, the exporter and the serving side must agree on.

Nothing in this package imports TensorFlow or Triton, or any of ``train``, ``export`` and ``serve``.
"""

from __future__ import annotations

__version__ = "0.1.0"
