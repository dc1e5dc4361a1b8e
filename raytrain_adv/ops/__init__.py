"""Operations that the libraries do not have, or have slower: each with the numerics of what it
stands in for, and a test that holds it to them.
"""
