"""The text that is scored: where it comes from (`text`), how it is cut into windows and micro-batches (`windows`)."""
