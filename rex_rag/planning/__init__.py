"""What a training run takes, by arithmetic: memory, seconds, settings that fit. Plain Python, no torch."""
