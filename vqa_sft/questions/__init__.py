"""What a question and its choices say by themselves: letters and permutations, which choices refer to others, the type
of the question. Standard library only; every package may ask.

Import from here: `letters`, `references.count_free`, `types.find_type`. Rules of another language are added to
`references` and `types`.
"""
