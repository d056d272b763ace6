/* Low latency: rows are pushed into slots of the peers' heaps; credit comes back with a later kernel.

   Operation n uses slot n % DEPTH of every rank. Rank h's heap holds, for every slot and every rank p that writes them:
   pushed (p's rows are there), weighed (its weights are), credit (p has received what h pushed to it), and the rows and
   weights. The programs of a kernel: the sender pushes, the releaser beside it gives credit (sender 1 of the code), the
   receiver reads, in the same kernel or in one of its own.

   Numbers grow for ever in the code. Here they are counted from about the slowest rank's (forget_numbers). */

#define IN_SLOT(heap, number, p) (((number) % DEPTH * R + (heap)) * R + (p))
#define PUSH_WORDS (DEPTH * R * R)
#define ROW(heap, number, p) (PULL_CELLS + IN_SLOT(heap, number, p))
#define WEIGHTS(heap, number, p) (PULL_CELLS + PUSH_WORDS + IN_SLOT(heap, number, p))
byte pushed[PUSH_WORDS], weighed[PUSH_WORDS], credit[PUSH_WORDS];
byte sent_to[PUSH_WORDS];	/* the last number that a rank has pushed to each other one */
byte received[DEPTH * R];	/* the last operation of a slot that a rank has received */
byte sent[R], receives[R], hooks[R];	/* last number sent; the one being received; slots whose hook was not called */
#define SENDER 4
#define RELEASER 8
#define RECEIVER 16

/* What is waited for. */
#define MAY_PUSH(r) (MUTANT == NO_CREDIT || credit[IN_SLOT(me, sent[me], r)] >= sent_to[IN_SLOT(me, sent[me], r)])
#define HAS_WEIGHED(s) (weighed[IN_SLOT(me, sent[me], s)] >= sent[me])
#define HAS_PUSHED(s) (pushed[IN_SLOT(me, receives[me], s)] >= (MUTANT == ANY_NUMBER -> 1 : receives[me]))
/* Or given up, at the deadline. */
#define WILL_NOT_FREE(r) (gone[r] && !MAY_PUSH(r) && MUTANT != NO_DEADLINE)
#define WILL_NOT_WEIGH(s) (gone[s] && !HAS_WEIGHED(s))
#define WILL_NOT_PUSH(s) (gone[s] && !HAS_PUSHED(s))
#define CREDIT_IS_CLEAR(r) (MAY_PUSH(r) || WILL_NOT_FREE(r))
#define PUSH_IS_CLEAR(s) (HAS_PUSHED(s) || WILL_NOT_PUSH(s))
#define ALL_HAVE_PUSHED (EVERY_PEER(PUSH_IS_CLEAR) && (HAS_PUSHED(me) || MUTANT == OWN_FLAG_IGNORED))
#define IS_UNRECEIVED(r) (received[sent[me] % DEPTH * R + me] < sent_to[IN_SLOT(me, sent[me], r)])
/* What must hold. */
#define WEIGHTS_ARE_THERE(s) (seen[WEIGHTS(me, sent[me], s)] == sent[me])
#define IS_MISSED(s) (!HAS_PUSHED(s) && sent[s] >= receives[me])
#define ROW_IS_THERE(s) (seen[ROW(me, receives[me], s)] == receives[me])

#define GOES_TO(r) (!(given_up & BIT(r)))

inline give_up(r, is_late)
{
	if
	:: is_late -> given_up = given_up | BIT(r); failed[me] = true
	:: else
	fi
}

inline give_up_creditor(r)
{
	give_up(r, WILL_NOT_FREE(r))
}

inline push_weights(r)
{
	if
	:: GOES_TO(r) -> seen[WEIGHTS(r, sent[me], me)] = sent[me]
	:: else
	fi
}

inline tell_weights(r)
{
	if
	:: GOES_TO(r) -> weighed[IN_SLOT(r, sent[me], me)] = sent[me]
	:: else
	fi
}

inline push_row(r)
{
	if
	:: GOES_TO(r) -> seen[ROW(r, sent[me], me)] = sent[me]
	:: else
	fi
}

inline tell_rows(r)
{
	if
	:: GOES_TO(r) -> pushed[IN_SLOT(r, sent[me], me)] = sent[me]; sent_to[IN_SLOT(me, sent[me], r)] = sent[me]
	:: else
	fi;
	seen[WEIGHTS(me, sent[me], r)] = 0	/* not to be read any more */
}

/* Hazards: a slot whose last rows are still read; a flag before what it speaks of. Who has been given up gets nothing,
   the others get all. A combine with exact_combine has no weights: to this model it is a dispatch. */
proctype sender(byte me)
{
	byte unsent, given_up;	/* peers, as bits */
idle:
end:	atomic {
		(running[me] & SENDER) && (EVERY_PEER(CREDIT_IS_CLEAR) || SOME_PEER(IS_UNRECEIVED)) ->
		if
		:: EVERY_PEER(CREDIT_IS_CLEAR)
		:: else -> failed[me] = true; goto sent_all	/* to nobody */
		fi;
		EACH_PEER(give_up_creditor);
		if
		:: op[me] == LOW_DISPATCH ->
#if MUTANT != FLAG_BEFORE_ROWS
			EACH_PEER(push_row);
#endif
			goto pushed_all
		:: op[me] == LOW_COMBINE ->
#if MUTANT != FLAG_BEFORE_WEIGHTS
			EACH_PEER(push_weights);
#endif
			EACH_PEER(tell_weights);
			unsent = PEERS & ~given_up
		fi
	};
#if MUTANT == FLAG_BEFORE_WEIGHTS
	atomic { EACH_PEER(push_weights) };
#endif
	do	/* a rank's rows go home when its weights have come */
	:: atomic {
		(unsent & BIT(LEFT)) && (HAS_WEIGHED(LEFT) || WILL_NOT_WEIGH(LEFT)) ->
		give_up(LEFT, WILL_NOT_WEIGH(LEFT));
weights_before_flag:
		assert(!GOES_TO(LEFT) || WEIGHTS_ARE_THERE(LEFT));
#if MUTANT != FLAG_BEFORE_ROWS
		push_row(LEFT);
#endif
		unsent = unsent - BIT(LEFT)
	   }
#if R > 2
	:: atomic {
		(unsent & BIT(RIGHT)) && (HAS_WEIGHED(RIGHT) || WILL_NOT_WEIGH(RIGHT)) ->
		give_up(RIGHT, WILL_NOT_WEIGH(RIGHT));
		assert(!GOES_TO(RIGHT) || WEIGHTS_ARE_THERE(RIGHT));
		push_row(RIGHT);
		unsent = unsent - BIT(RIGHT)
	   }
#endif
	:: atomic { unsent == 0 -> goto pushed_all }
	od;
pushed_all:
	atomic {
		!(running[me] & RELEASER) ->
		pushed[IN_SLOT(me, sent[me], me)] = sent[me];
		EACH_PEER(tell_rows);
#if MUTANT == FLAG_BEFORE_ROWS
	};
	atomic {
		EACH_PEER(push_row);
#endif
sent_all:
		given_up = 0;
		running[me] = running[me] - SENDER;
		goto idle
	}
}

/* Hazard: credit for what is still read. So it speaks of what the kernels before this one have received. */
inline give_credit(r)
{
	d_step {
		for (i : 0 .. DEPTH - 1) { credit[IN_SLOT(r, i, me)] = received[i * R + me] }
		i = 0
	}
}

proctype releaser(byte me)
{
idle:
end:	atomic {
		(running[me] & RELEASER) && (MUTANT != CREDIT_AFTER_PUSH || EVERY_PEER(CREDIT_IS_CLEAR)) ->
		EACH_PEER(give_credit);
		running[me] = running[me] - RELEASER;
		goto idle
	}
}

inline forget_row(r)	/* not to be read any more */
{
	seen[ROW(me, receives[me], r)] = 0
}

/* Its own rank's flag, too, is waited for: it says that the releaser of the same kernel is through. Hazard: a rank that
   is there is missed because it has given up another one. */
proctype receiver(byte me)
{
idle:
end:	atomic {
		(running[me] & RECEIVER) && (ALL_HAVE_PUSHED || failed[me]) ->
		if
		:: failed[me] -> goto received_all
		:: else
		fi;
only_the_lost_are_missed:
		assert(!SOME_PEER(IS_MISSED));
		if
		:: EVERY_PEER(HAS_PUSHED)
		:: else -> failed[me] = true; goto received_all
		fi;
		received[receives[me] % DEPTH * R + me] = receives[me];
#if MUTANT == CREDIT_BEFORE_READING
		give_credit(LEFT);
#endif
row_before_flag:
		assert(EVERY_PEER(ROW_IS_THERE))
	};
	atomic {
		running[me] & RECEIVER ->
row_until_credit:
		assert(EVERY_PEER(ROW_IS_THERE));
		EACH_PEER(forget_row);
received_all:
		receives[me] = 0; running[me] = running[me] - RECEIVER;
		goto idle
	}
}

inline start_receive(slot)
{
	hooks[me] = hooks[me] - (1 << (slot));
	receives[me] = sent[me] - (sent[me] + DEPTH - (slot)) % DEPTH;
	running[me] = running[me] + RECEIVER
}

inline start_push()
{
	sent[me]++;
	if
	:: HOOKS & 1 -> receives[me] = sent[me]; running[me] = SENDER + RELEASER + RECEIVER
	:: HOOKS & 2 -> hooks[me] = hooks[me] + (1 << (sent[me] % DEPTH)); running[me] = SENDER + RELEASER
	fi
}

#define YOUNGER(number) number = (number > DEPTH -> number - DEPTH : 0)

inline forget_numbers()
{
	d_step {
		if
		:: sent[0] > 2 * DEPTH && sent[1] > 2 * DEPTH && sent[R - 1] > 2 * DEPTH ->
			for (i : 0 .. R - 1) { YOUNGER(sent[i]); YOUNGER(receives[i]) }
			for (i : 0 .. DEPTH * R - 1) { YOUNGER(received[i]) }
			for (i : 0 .. PUSH_WORDS - 1) { YOUNGER(pushed[i]); YOUNGER(weighed[i]); YOUNGER(credit[i]); YOUNGER(sent_to[i]) }
			for (i : PULL_CELLS .. CELLS - 1) { YOUNGER(seen[i]) }
			i = 0
		:: else
		fi
	}
}
