"""A deployed model for other programs: an endpoint with OpenAI's API, and an evaluation harness."""
