"""Image tokenizers: pictures to grids of ids and back."""
