"""How several models' answers become one. Pure: who is asked, and when, is proxy.ensemble's.

Each strategy takes the answers and returns a Verdict: which of them it is, and what there is to tell of the choice.
None of them depends on the order in which the answers came.
"""
