"""PEFT's LoRA layers over an NF4 base."""
