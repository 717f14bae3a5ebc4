"""Threads that wait for work sleep: import this before torch, and a shared CPU stays usable.

torch's OpenMP threads spin between two operations, ready for the next one. Where other programs
want the same cores, a thread that spins takes the time of one that works, and a step may take
several times as long. OMP_WAIT_POLICY=PASSIVE lets them sleep. OpenMP reads it once, when torch is
imported. It changes no number. Whoever has set it keeps what they have set.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
