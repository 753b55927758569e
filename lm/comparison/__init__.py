"""Comparing runs on one text: is B better than A, by how much, and where?

    import lm

    found = lm.compare(["shakespeare-gru", "my-run"])
    print(found.verdict.sentence)
    for difference in found.differences:
        print(difference.sentence)

text ──► scored (nats of each token) ──► byte_nats (nats of each byte) ──► bootstrap, places, passages ──► Comparison
"""
