"""What several tests share: tiny models, and runs in other processes."""
