"""Faults, injected on purpose at random moments into runs of a small model, and what must hold after each.

    make chaos                                  every fault, bounded in time, seeded
    make chaos ARGS="--only driver-killed --times 200 --seed 7"

After each fault the same command runs again, and then: every artifact has the sha256 of an undisturbed run; nothing
that was finished is done again; no file under a final name is half a file, before or after; no process is left.
"""
