"""How fast images are drawn, beside `transformers` and beside what the machine's own rates allow."""
