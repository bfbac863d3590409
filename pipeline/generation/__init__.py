"""Prompts to answers: what is asked for (`requests`), and tokens that become text while they come (`text`)."""
