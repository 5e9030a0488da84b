"""What a model costs and what streams are worth: counting and fitting, without MLX or ONNX."""
