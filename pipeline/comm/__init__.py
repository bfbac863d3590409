"""What ranks say to each other: their place (`world`), the watch over them (`watchdog`), small values beside the links
(`control`), and the links themselves: frames (`wire`), buffers that move (`mailbox`), one end (`link`), all ends of a
rank (`link_ends`).
"""
