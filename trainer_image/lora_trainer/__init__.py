"""What runs in the pods of a LoRAFineTune: QLoRA over one or more nodes, evaluated and published.

Start with ``train``. ``launch`` is the pods' first process; ``docs/training.md`` tells how the parts fit together.
"""

__version__ = "0.1.0"
