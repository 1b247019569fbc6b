"""How many tokens a step of the LLM yields: the tables of SpecInfer's evaluation, on models of one's own.

Runs in one process, or some that share nothing: what is counted does not depend on time.
"""
