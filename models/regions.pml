/* Direct memory: how an ordinary allocation of an owner becomes readable by its peers, ceases to be, and how its number
   goes to another one. The owner and R - 1 readers, each a host and the stream that it is ahead of. */

#ifndef R
#define R 2
#endif
#ifndef NUMBERS
#define NUMBERS 1
#endif
#ifndef TENSORS
#define TENSORS 1
#endif
#ifndef QUEUE
#define QUEUE 2
#endif
#ifndef REFUSES
#define REFUSES 0
#endif

#define NONE 0
#define NO_IDENTITY 1
#define REUSE_BEFORE_CLOSED 2
#define STATE_BEFORE_ENTRY 3
#define POSTED_BEFORE_STATE 4
#define ANSWERED_BEFORE_ACK 5
#define ANSWER_AT_POLL 6
#define ANSWER_AT_LAUNCH 7
#define FIRST_READER_DECIDES 8
#define READY_STAYS 9
#define RETIRED_UNNOTICED 10
#ifndef MUTANT
#define MUTANT NONE
#endif

#define READERS (R - 1)
#define OF(r, k) ((r) * NUMBERS + (k))

/* What refers to an allocation says that of which tensor it is, or that it is gone: an identity never comes back. */
#define ALLOCATION(t) (t + 1)
#define GONE (TENSORS + 1)

/* The owner's mailbox. States: even = open, odd = closing or closed; they grow by 1, here modulo 4. */
#define CLOSED 3
byte state[NUMBERS], late_state[NUMBERS], entry[NUMBERS], late_entry[NUMBERS];
bool posted[READERS], answered;	/* whether the other side has not looked since */
byte ack[READERS * NUMBERS], late_ack[READERS * NUMBERS];
byte mapping[READERS * NUMBERS];
/* The owner's host and device. */
byte known[TENSORS], known_identity[TENSORS], current[NUMBERS];
bool unsettled[NUMBERS], is_free[NUMBERS], ready[NUMBERS], device_ready[NUMBERS], may_settle, changed, running;
/* A reader's host and device. */
byte followed[READERS * NUMBERS], table[READERS * NUMBERS], device_table[READERS * NUMBERS];
byte answer[READERS * NUMBERS];
#define FOLLOWED 1
#define STARTED 2
#define ON_DEVICE 3
/* Between the devices: what pull.pml shows; 0 = released. */
byte message[READERS], expected[READERS];
#define STAGED (NUMBERS + 1)
bool refused[NUMBERS];

byte launched[R], i;
bool resting;
mtype = { COPY, KERNEL };
chan owner_queue = [QUEUE] of { mtype, byte, byte };
chan reader_queue[READERS] = [QUEUE] of { mtype, byte };

#define IS_OPEN(s) ((s) % 2 == 0)
#if R == 2
#define EVERY_READER(condition) (condition(0))
#else
#define EVERY_READER(condition) (condition(0) && condition(1))
#endif
#define HAS_ANSWERED(r) (ack[OF(r, k)] == current[k])
#define HAS_RELEASED(r) (message[r] == 0)
#define FOLLOWS(r) ((current[k] + 4 - followed[OF(r, k)]) % 4 <= 2)

proctype memory()
{
end:	do
	:: d_step { late_entry[0] != 0 -> entry[0] = late_entry[0]; late_entry[0] = 0 }
	:: d_step { late_state[0] != 0 -> state[0] = late_state[0] - 1; late_state[0] = 0 }
	:: d_step { late_ack[0] != 0 -> ack[0] = late_ack[0] - 1; late_ack[0] = 0 }
#if NUMBERS > 1
	:: d_step { late_entry[1] != 0 -> entry[1] = late_entry[1]; late_entry[1] = 0 }
	:: d_step { late_state[1] != 0 -> state[1] = late_state[1] - 1; late_state[1] = 0 }
#endif
#if (NUMBERS * (R - 1)) > 1
	:: d_step { late_ack[1] != 0 -> ack[1] = late_ack[1] - 1; late_ack[1] = 0 }
#endif
#if (NUMBERS * (R - 1)) > 2
	:: d_step { late_ack[2] != 0 -> ack[2] = late_ack[2] - 1; late_ack[2] = 0 }
	:: d_step { late_ack[3] != 0 -> ack[3] = late_ack[3] - 1; late_ack[3] = 0 }
#endif
	od
}

/* Calls: every rank makes the same ones. At rest a rank makes those that others have made, and no others. */
#define IS_BEHIND(r) (launched[r] < launched[0] || launched[r] < launched[1] || launched[r] < launched[R - 1])
inline launch(r)
{
	launched[r]++;
	if
	:: launched[0] > 0 && launched[1] > 0 && launched[R - 1] > 0 ->
		for (i : 0 .. R - 1) { launched[i]-- }
		i = 0
	:: else
	fi
}

/* A state after its entry, and the call to look after the state. */
inline set_state()
{
	atomic {
		late_entry[k] == 0 || MUTANT == STATE_BEFORE_ENTRY ->
		current[k] = (current[k] + 1) % 4;
		unsettled[k] = true; may_settle = true; changed = (MUTANT != RETIRED_UNNOTICED || IS_OPEN(current[k]) -> true : changed);
		refused[k] = false;
generations_stay_near:
		assert(EVERY_READER(FOLLOWS));
		late_state[k] = current[k] + 1
	};
	atomic {
		late_state[k] == 0 || MUTANT == POSTED_BEFORE_STATE ->
		posted[0] = true; posted[READERS - 1] = true
	}
}

inline age(what)
{
	what = (what == ALLOCATION(t) -> GONE : what)
}

/* Another allocation for a tensor. */
inline allocate()
{
	age(known_identity[0]); age(known_identity[TENSORS - 1]);
	for (i : 0 .. NUMBERS - 1) { age(entry[i]); age(late_entry[i]) }
	for (i : 0 .. READERS * NUMBERS - 1) { age(mapping[i]); age(table[i]); age(device_table[i]) }
	i = 0; t = 0
}

#define IS_CLOSED(r) (followed[OF(r, k)] == current[k] && ack[OF(r, k)] == current[k] && late_ack[OF(r, k)] == 0)
inline settle()
{
	d_step {
	if
	:: unsettled[k] && (EVERY_READER(HAS_ANSWERED) || (MUTANT == REUSE_BEFORE_CLOSED && !IS_OPEN(current[k])) || (MUTANT == FIRST_READER_DECIDES && HAS_ANSWERED(0))) ->
		unsettled[k] = false;
		if
		:: IS_OPEN(current[k]) -> ready[k] = true; changed = true
		:: else -> is_free[k] = true;
			if	/* all agree: their states can be counted anew */
			:: EVERY_READER(IS_CLOSED) && state[k] == current[k] && late_state[k] == 0 -> 
				state[k] = CLOSED; current[k] = CLOSED; entry[k] = 0;
				for (i : 0 .. READERS - 1) { followed[OF(i, k)] = CLOSED; ack[OF(i, k)] = CLOSED }
				i = 0
			:: else
			fi
		fi
	:: else
	fi
	}
}

proctype owner_host()
{
	byte t, k, place;
end:	do
	:: atomic { (answered || may_settle || changed) && nfull(owner_queue) -> answered = false; may_settle = false };
#if NUMBERS > 1
		atomic { settle(); k = 1};
#endif
		atomic { settle(); k = 0;
		if
		:: changed -> owner_queue!COPY(0, 0); changed = false
		:: else
		fi }
	:: atomic { (!resting || IS_BEHIND(0)) && nfull(owner_queue) ->
		if
		:: t = 0
		:: TENSORS > 1 -> t = TENSORS - 1
		fi;
		/* expose; hazard: another allocation at the same address */
		if
		:: known[t] != 0 && (known_identity[t] == ALLOCATION(t) || MUTANT == NO_IDENTITY) -> place = known[t]; goto start
		:: known[t] != 0 && known_identity[t] != ALLOCATION(t) && MUTANT != NO_IDENTITY -> k = known[t] - 1; known[t] = 0; known_identity[t] = 0;
				ready[k] = (MUTANT == READY_STAYS -> ready[k] : false)
		:: known[t] == 0 -> goto find
		fi };
		set_state();
		find:
		atomic {
			k = 0;
			do
			:: k < NUMBERS && !is_free[k] -> k++
			:: else -> break
			od;
			if
			:: k < NUMBERS -> is_free[k] = false; known[t] = k + 1; known_identity[t] = ALLOCATION(t); place = k + 1;
				late_entry[k] = ALLOCATION(t)
			:: else -> place = 0; goto start
			fi };
			set_state();
		start:
		atomic {
		k = 0;
		owner_queue!KERNEL(place, t);
		launch(0); place = 0; t = 0 }
	:: atomic { !resting && !running && empty(owner_queue) -> t = 0; allocate() }
#if TENSORS > 1
	:: atomic { !resting && !running && empty(owner_queue) -> t = 1; allocate() }
#endif
	:: atomic { !resting -> resting = true }
	od
}

proctype owner_device()
{
	byte place, t, k;
end:	do
	:: atomic { owner_queue?COPY(_, _) -> 
		for (k : 0 .. NUMBERS - 1) { device_ready[k] = ready[k] }
		k = 0 }
	:: atomic { owner_queue?[KERNEL, _, _] && EVERY_READER(HAS_RELEASED) ->
		owner_queue?KERNEL(place, t);
		if
		:: place != 0 && device_ready[place - 1] -> 
			running = true;
			expected[0] = ALLOCATION(t); expected[READERS - 1] = ALLOCATION(t);
			message[0] = place; message[READERS - 1] = place;
			place = 0; t = 0;
			EVERY_READER(HAS_RELEASED) -> running = false
		:: else -> message[0] = STAGED; message[READERS - 1] = STAGED; place = 0; t = 0
		fi }
	od
}

#define MINE OF(me, k)
#define MY_ACK (late_ack[MINE] != 0 -> late_ack[MINE] - 1 : ack[MINE])

proctype reader_host(byte me)
{
	byte k, mask;
idle:
end:	do
	:: atomic { posted[me] && nfull(reader_queue[me]) -> posted[me] = false; k = 0 };
		do	/* follow */
		:: atomic {
			k < NUMBERS && state[k] != followed[MINE] ->
states_follow:
			assert((IS_OPEN(followed[MINE]) && state[k] == (followed[MINE] + 1) % 4) ||
				(!IS_OPEN(followed[MINE]) && MY_ACK == followed[MINE] && state[k] != (followed[MINE] + 3) % 4));
			followed[MINE] = state[k]; table[MINE] = 0; answer[MINE] = 0
			};
			atomic {
			if
			:: IS_OPEN(followed[MINE]) ->
opens_what_was_posted:
				assert(entry[k] != 0);
				mapping[MINE] = entry[k]; table[MINE] = entry[k]; answer[MINE] = FOLLOWED
			:: IS_OPEN(followed[MINE]) && REFUSES -> refused[k] = true
			:: !IS_OPEN(followed[MINE]) -> answer[MINE] = FOLLOWED
			fi;
			if
			:: MUTANT == ANSWER_AT_POLL && answer[MINE] != 0 -> answer[MINE] = ON_DEVICE
			:: else
			fi;
			k++ }
		:: atomic { k < NUMBERS && state[k] == followed[MINE] -> k++ }
		:: atomic { k == NUMBERS -> 
			for (k : 0 .. NUMBERS - 1) {
				if
				:: answer[MINE] == FOLLOWED -> mask = mask | (1 << k); answer[MINE] = (MUTANT == ANSWER_AT_LAUNCH -> ON_DEVICE : STARTED)
				:: else
				fi
			}
			k = 0;
			if
			:: mask != 0 -> reader_queue[me]!COPY(mask); mask = 0
			:: else
			fi;
			break
		}
		od
	:: atomic { answer[OF(me, 0)] == ON_DEVICE -> k = 0; goto acknowledge }
#if NUMBERS > 1
	:: atomic { answer[OF(me, 1)] == ON_DEVICE -> k = 1; goto acknowledge }
#endif
	:: atomic { (!resting || IS_BEHIND(me + 1)) && nfull(reader_queue[me]) -> reader_queue[me]!KERNEL(0); launch(me + 1) }
	od;
acknowledge:	/* hazard: the owner is told before the device knows, or before the mapping is closed */
	atomic {
		answer[MINE] = 0;
		if
		:: !IS_OPEN(followed[MINE]) -> mapping[MINE] = 0
		:: else
		fi;
		late_ack[MINE] = followed[MINE] + 1
	};
	atomic {
		late_ack[MINE] == 0 || MUTANT == ANSWERED_BEFORE_ACK ->
		answered = true; k = 0;
		goto idle
	}
}

#define DIRECT_IS_THERE (message[me] == STAGED || \
	(device_table[OF(me, message[me] - 1)] == expected[me] && mapping[OF(me, message[me] - 1)] == expected[me]))

proctype reader_device(byte me)
{
	byte k, mask;
end:	do
	:: atomic {
		reader_queue[me]?COPY(mask) ->
		for (k : 0 .. NUMBERS - 1) {
			device_table[MINE] = table[MINE];
			if
			:: (mask & (1 << k)) && answer[MINE] == STARTED -> answer[MINE] = ON_DEVICE
			:: else
			fi
		}
		k = 0; mask = 0
	   }
	:: atomic { message[me] != 0 && reader_queue[me]?[KERNEL, _] ->
		reader_queue[me]?KERNEL(_);
region_is_known:
			assert(DIRECT_IS_THERE)
		};
		atomic {
			true ->
region_stays_open:
			assert(DIRECT_IS_THERE);
			message[me] = 0; expected[me] = 0
		}
	od
}

/* When all have come to rest, what was posted has been answered. */
#define NUMBER_IS_SETTLED(k) (!unsettled[k] || refused[k])
proctype watcher()
{
	timeout ->
calls_end:
	assert(resting && !running && empty(owner_queue) && empty(reader_queue[0]) && empty(reader_queue[READERS - 1]));
all_is_answered:
	assert(NUMBER_IS_SETTLED(0) && NUMBER_IS_SETTLED(NUMBERS - 1))
}

init {
	atomic {
		for (i : 0 .. NUMBERS - 1) { is_free[i] = true; state[i] = 3; current[i] = 3 }
		for (i : 0 .. READERS * NUMBERS - 1) { followed[i] = 3; ack[i] = 3 }
		for (i : 0 .. READERS - 1) { run reader_host(i); run reader_device(i) }
		run owner_host(); run owner_device(); run memory(); run watcher();
		i = 0
	}
}
