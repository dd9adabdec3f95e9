"""``python -m lora_operator``."""

from lora_operator.main import main

if __name__ == "__main__":
    main()
