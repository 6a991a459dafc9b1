"""The fuzzer: sound files, mutants of them that know where the fields are, and what must hold for each."""
