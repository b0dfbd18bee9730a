"""What clients reach instead of Triton's own HTTP port: bounded requests, and only to what is meant for them."""
