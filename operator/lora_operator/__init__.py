"""The LoRAFineTune operator. Start reading at :mod:`lora_operator.reconcile`."""
