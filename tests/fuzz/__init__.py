"""Readers of strangers' files, fed with damaged ones until something other than a refusal of ours comes out.

    make fuzz                                   each reader for a minute
    make fuzz ARGS="--only gguf --seconds 600 --seed 7"

Inputs are mutated by atheris (libFuzzer), which follows the coverage of our code; a few hundred by `mutated` alone are
part of the tests. A finding is any error that is not one of ours, more than five seconds, or more than a GiB.
"""
