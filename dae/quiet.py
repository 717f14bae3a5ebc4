"""Threads that wait for work soon sleep: import this before torch, and a shared CPU stays usable.

torch's OpenMP threads spin between two operations, ready for the next one. Where other programs
want the same cores, a thread that spins takes the time of one that works. With GOMP_SPINCOUNT=1000
it spins for some microseconds and then sleeps. Seconds of a training step of the demo's network on
two cores:

                                  alone      beside two busy programs    two runs at once
    torch's own                   0.55-0.69          2.2                       2.7
    GOMP_SPINCOUNT=1000           0.74               1.3                       1.25
    OMP_WAIT_POLICY=PASSIVE       0.83-0.94          1.4                       1.2

OpenMP reads it once, when torch is imported. It changes no number. Whoever has set how threads wait
keeps what they have set.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
