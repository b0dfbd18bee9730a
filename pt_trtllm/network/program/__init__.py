"""The decoder as a program: recorded once per engine, then run by the kernel libraries with few calls per step."""
