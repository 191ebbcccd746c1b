"""What a quantized base is: the codebooks, their definition in plain torch, and the conversion of a loaded model."""
