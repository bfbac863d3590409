"""Answers over the network: an endpoint with OpenAI's API in front of the scheduler."""
