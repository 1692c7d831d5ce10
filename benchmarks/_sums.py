"A reward for sums: right digits count, so that an almost right answer is better than a wild one."
from moe_rl.rollout.environments import last_number


def digits(task, turns) -> float: # 1: right; else at most 1/2
    "Half the share of digits that are right, counted from the last; the other half for a number that is right as a whole."
    said, right = last_number(turns[-1]) or '', task.answer
    if said == right: return 1.0
    if said.startswith('-') != right.startswith('-'): return 0.0
    a, b = said.lstrip('-')[::-1], right.lstrip('-')[::-1]
    return sum(x == y for x, y in zip(a, b))/max(len(a), len(b))/2
