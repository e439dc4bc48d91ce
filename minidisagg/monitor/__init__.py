"""`minidisagg monitor`: a full-screen view of a running server. It speaks HTTP only and imports nothing of the engine.

state.py    what the events of the server add up to; a pure function of them
view.py     the state as text of a given size; pure as well
keys.py     what a key does
load.py     a load generator to look at
app.py      the terminal, the stream and the clock that tie them together
"""
