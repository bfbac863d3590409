"""What may come next, guessed where it costs no lap of the ring: drafters, and how many of their drafts are worth a
pass. What the model says of them, the head decides; nothing here changes an answer.
"""
