"""The LoRAFineTune operator. Start reading at :mod:`lora_operator.controller.reconcile`."""
