"""English text written for this project, from which the `text` data set cuts its prompts."""

from __future__ import annotations

PASSAGES = (
    "The lighthouse keeper wrote down the weather four times a day, even in the years when nobody read the book. He "
    "noted the height of the swell by comparing it with the iron ladder on the east rock, and the visibility by which "
    "of the three islands he could count. When the station was automated, a box the size of a suitcase took over his "
    "work. It measures a dozen quantities every second, and yet the old columns of pencil figures turned out to be "
    "useful: they reach back a hundred and twelve years, and the ladder is still there.",
    "A bakery makes two kinds of decisions. In the evening it decides how much dough to prepare, which cannot be "
    "changed later, and in the morning it decides what to bake from that dough, which can be changed every half hour. "
    "The evening decision needs a forecast; the morning decision needs only a look at the shelves. Most of the money "
    "that bakeries lose is lost by treating the second kind of decision like the first: by fixing a plan for the whole "
    "morning and then following it although the shelves say otherwise.",
    "Moss has no roots. It drinks through its leaves, a single layer of cells thick, and when the air turns dry it "
    "simply stops: the plant shrivels, turns grey and waits. Some species can wait for years. When rain comes they are "
    "green again within minutes and start to repair the damage. This is a very different answer to drought from that "
    "of a tree, which spends a great deal of effort on pumps and valves to make sure that it never dries out at all.",
    "The village had one telephone, in the post office, and the postmistress knew the sound of every line. Long "
    "distance calls were announced by two short rings. If the person wanted was in the fields, a boy was sent running, "
    "and the caller, who was paying by the minute, waited. People learned to begin with the important thing. Years "
    "later, when every house had a telephone of its own, visitors from the city still found conversations there "
    "startlingly direct: first the news, then the reason, and only then the weather.",
    "A queue is a way to turn time into fairness. Without one, whoever pushes hardest is served first; with one, "
    "everybody pays the same price, in minutes. But a queue also hides something. When a counter is busy half of the "
    "time, the line is short and looks harmless. At three quarters it is longer, still bearable. Between nine tenths "
    "and full use it grows without warning, because every small delay is added to all the waits behind it. Managers "
    "who look only at how busy their counters are will never understand why the customers are angry.",
    "To sharpen a plane iron you need a flat stone, some water and patience. First flatten the back, but only the last "
    "few millimetres next to the edge. Then hold the bevel against the stone so that it rests on heel and toe, and "
    "draw it towards you with even pressure. After a dozen strokes you can feel a thin burr along the edge. Turn the "
    "iron over, lay it quite flat and take the burr off with one light stroke. Repeat on a finer stone. A sharp iron "
    "cuts the hair on your forearm, and a dull one teaches you to push, which is how people get hurt.",
    "In the spring of the second year the expedition ran out of paper. The botanist began to write on the backs of "
    "labels, then on bark, and finally he dictated his descriptions to three members of the party, each of whom had to "
    "learn a third of them by heart and recite them every evening. When they returned to the coast the recitations "
    "were written down and compared with the dried plants. Of two hundred and six descriptions, one hundred and "
    "ninety-eight could be matched. The eight others, the botanist used to say, were the most interesting ones.",
    "The river changes its bed about once in a generation. Maps from four different centuries, laid on top of each "
    "other, show it swinging across the plain like a slow rope. Each time it leaves behind a crescent of still water, "
    "and the villages have their names from these: Old Bend, Far Bend, Bend of the Oxen. Engineers have proposed many "
    "times to fix the river in its present place. The farmers have always been against it, since the fields that the "
    "river has visited are the ones where everything grows.",
    "An orchestra tunes to the oboe because the oboe cannot do otherwise: its pitch is set by the reed and hardly "
    "moves. The strings could take any note from any instrument, and so they take it from the one that has no choice. "
    "There is a general lesson in this about where to put the fixed point of a system. Do not ask who is the most "
    "important; ask who is the least able to adapt, and let all the others follow.",
    "Her first computer had so little memory that she kept a list, on squared paper, of what was in every part of it. "
    "If a new routine was to be added, something had to be moved or made shorter, and often the shortening showed that "
    "two routines were really the same one with different numbers. She did not miss those days, exactly. But now and "
    "then, looking at a program of a million lines in which nobody could find anything, she thought of the squared "
    "paper, and of how calm it had been to know where everything was.",
    "Salt was once carried over the pass by mules, and every twelve kilometres stood a house where animals were "
    "changed. The drivers never walked the whole way. Each of them knew one stretch, in every weather and by night, "
    "and handed the load to the next. A sack could cross the mountains in four days, although no mule and no man ever "
    "did it in less than seven. When the first railway tunnel was opened the houses became inns, and at some of them "
    "you can still see the stone where the sacks were weighed, so that each driver answered for his own stretch only.",
    "Children who grow up with two languages often mix them, and their parents worry. Recordings of such mixing show "
    "that it follows rules: a sentence changes language at places where the grammar of both allows it, and almost "
    "never elsewhere. To do this, a child has to know both grammars and to keep track of where it is in each. What "
    "sounds like confusion is closer to the work of an interpreter who is fluent enough to play.",
)

QUESTIONS = (
    "Summarize the text above in two sentences.",
    "Explain to a ten-year-old why the sky is dark at night although there are so many stars.",
    "What is the difference between latency and throughput? Give an example from everyday life.",
    "Write a short poem about a train that is late.",
    "List five things that one should check before buying a used bicycle.",
    "Why does bread rise, and what goes wrong when it does not?",
    "Describe how a letter got from one town to another two hundred years ago.",
    "Give three arguments for and three against keeping a diary.",
    "How would you measure the height of a tree with a stick and a tape measure?",
    "Write a polite note to a neighbour who plays the trumpet after ten in the evening.",
    "What happens inside a lock when the right key is turned? Explain it step by step.",
    "Plan a simple dinner for four guests, one of whom eats no meat, and list what has to be bought.",
    "Which of the ideas mentioned so far would still hold if people lived for two hundred years, and why?",
    "Write a Python function that returns the longest word of a sentence, and explain how it works.",
    "A farmer has seventeen sheep and all but nine run away. How many are left? Explain your reasoning.",
    "Compare walking, cycling and taking the bus for a journey of three kilometres in the rain.",
    "Tell the story of a forgotten umbrella from the umbrella's point of view.",
    "What should a good manual for a washing machine contain, and what should it leave out?",
    "Explain how a vaccine works without using any technical terms.",
    "Invent a proverb about patience and describe the occasion on which it was first said.",
    "Why do cities tend to grow at the mouths of rivers?",
    "What could a library do in the evening hours to be useful to people who do not read much?",
)
